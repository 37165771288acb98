"""The commands of `vlmo-fast`, a file each, which reads options, calls the library and prints. No library imports them.

A command's module has `configure(parser)`, which describes it and adds its options, and `run(args)`, which returns the
exit status; None is 0. What the library raises becomes one message. `vlmo_fast.cli` lists the commands.
"""
