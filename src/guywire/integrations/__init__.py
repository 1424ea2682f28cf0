"""Callbacks for the trainers of others: transformers, lightning."""
