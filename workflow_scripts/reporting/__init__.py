"""What people look at: statistics behind the figures, the drawings, and the page."""
