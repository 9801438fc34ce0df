"""A policy that writes training data for a stream of tasks, and learns from one to the next."""
