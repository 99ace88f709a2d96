"""From plain text to a GPT-2 class model with the Hugging Face libraries."""
