"""The checks of `openvla_hf.evaluation.check`, each a function that returns findings."""
