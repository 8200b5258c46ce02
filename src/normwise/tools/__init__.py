"""Tools that work on models and on the process that trains them; import from the submodules."""
