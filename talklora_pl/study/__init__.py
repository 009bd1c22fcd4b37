"""Comparing methods: a study is methods x data x seeds, told apart by scores, cost and load.

`plan` reads a study and says which runs there are, `work` makes them, `statistics` and `report` say what came out.
"""
