"""Claims about memory, time and exactness, measured side by side."""
