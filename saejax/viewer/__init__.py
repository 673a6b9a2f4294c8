"""What a person looks at: the self-contained report page and the figures."""
