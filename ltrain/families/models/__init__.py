"""One file per model_type of Hugging Face, which sets FAMILY."""
