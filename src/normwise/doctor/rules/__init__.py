"""The rules: one file each, named after the code and the pattern. A rule imports no other rule."""
