"""The speedrun: tokenizer, base model, SFT and report, each stage a function from folder to folder."""
