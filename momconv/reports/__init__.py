"""Results as tables, pictures, documents and model cards."""
