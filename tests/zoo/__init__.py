"""Every causal language model of the installed transformers, and encoders that people serve, tiny and random."""
