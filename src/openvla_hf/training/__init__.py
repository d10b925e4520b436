"""Fine-tuning with named recipes on top of `transformers.Trainer`."""
