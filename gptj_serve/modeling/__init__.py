"""The model family as a library: classes named and shaped as in Hugging Face transformers, in one process, no Ray."""
