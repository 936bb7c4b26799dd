"""Policy folders, local and on the Hugging Face Hub."""
