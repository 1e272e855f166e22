"""A store of page objects in files: the tier under the host tier. Imports no SGLang."""
