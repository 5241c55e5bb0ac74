"""Bad inputs by area: what is called, the exception, the words in its message, and that nothing changed (`harness.py`).

A row of a table is a call, or a change to a good call, with its exception and words. Each kind of bad value has a row
where its check is used; each argument has a row that shows that it is checked. Damaged adapter files are in
tests/peft/test_refused.py and test_fuzzed_files.py, damaged tuning tables in tests/tuning/test_table.py.
"""
