"""Text, tokens and activation stores."""
