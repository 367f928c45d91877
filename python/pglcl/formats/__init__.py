"""What images and labels are kept in: one module each kind of file, and their names."""
