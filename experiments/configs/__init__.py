"""Named configurations: each module has one `get_config()`; the package ships them as `nested_reft.configs`."""
