"""A small simulated robot, and the policy that ships for it."""
