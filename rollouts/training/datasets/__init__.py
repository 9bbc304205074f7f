"""Rows in, samples out: loaders, chat tokenization and masks, packing, and the stream of prompts."""
