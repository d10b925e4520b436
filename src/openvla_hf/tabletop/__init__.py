"""A small simulated table, its expert, and the policy that ships for it."""
