"""Bad inputs by area: what is called, the exception, the words in its message, and that nothing changed (`harness.py`).

A table's row is a call, or what it changes in a good one, with its exception and words; a bad input that is found gets
its row. Damaged adapter files are in tests/peft/test_refused.py and test_fuzzed_files.py, damaged tuning tables in
tests/tuning/test_table.py.
"""
