"""Bad inputs by area. Each has a call, its exception, words of the message, and a check for changes (`harness.py`).

A row of a table is a call, or a change to a good call, with its exception and words. Each kind of bad value has a row
at its check; each argument has a row that shows that it is checked. Damaged adapter files are in
tests/peft/test_damaged.py, damaged tuning tables in tests/tuning/test_table.py.
"""
