"""From a model's name to its files, checked: nothing in a model folder is trusted."""
