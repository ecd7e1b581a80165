"""What people look at: the gallery, the statistics behind the figures, the drawings, and the page."""
