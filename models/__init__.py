"""Pyro models with real data, one per file: each imports pyro, torch and bayestie only."""
