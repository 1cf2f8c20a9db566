"""Configuration: an experiment's TOML file and the command line, merged into one frozen model a stage.

In the order to read: ``stage_config`` (what every stage's configuration has), ``experiment`` (file and command line
become one tree, validated once), ``mistakes`` (validation errors in the user's terms), ``command_line`` (the entry of
every command, with ``--help``), ``schema`` (walks over the models), ``dotted_keys`` and ``renamed_keys``. Beside them
``errors`` (ConfigError), ``outcome`` (outcome.json), ``logs`` (log lines with time, level and rank) and ``redaction``
(addresses without passwords). The lowest storey of the runtime: it may import ``data`` and ``models``, and nothing
above itself.
"""
