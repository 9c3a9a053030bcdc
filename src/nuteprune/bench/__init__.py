"""Two models side by side: size, memory and speed."""
