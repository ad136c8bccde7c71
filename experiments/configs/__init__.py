"""Named configurations: each module has one `get_config()`; the package ships them as `nested_reft.configs`.

`nested-reft configs` lists them from their docstrings: the first line says what a configuration is, and a line
`Time: ...` says how long a run takes and on what, or that nobody has measured it.
"""
