"""Training: trainer, arguments, collator and recipes."""
