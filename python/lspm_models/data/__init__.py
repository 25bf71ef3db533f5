"""From files, folders and packages to what a model trains on."""
