"""A world of moving shapes, and how the small Wan that ships with the program was trained on it."""
