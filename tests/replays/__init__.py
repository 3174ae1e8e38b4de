"""One module a group of families; a function a family: ``(options, inputs, wanted) -> {output: value}``."""
