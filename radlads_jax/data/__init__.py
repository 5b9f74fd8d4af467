"""Text to batches: documents, token files, packed rows, and the pipeline over them."""
