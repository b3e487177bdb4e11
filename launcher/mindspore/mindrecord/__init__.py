"""MindRecord: MindSpore's files of records, read without MindSpore and without their `.db` index.

header.py     the JSON at the start of a file: schema, pages, family; standard library only
files.py      which files a path means: a family of shards, a list, a folder
msgpack.py    values of scalar fields
integers.py   the narrowed integers of array fields
walk.py       where the rows of a page begin
reader.py     rows of one file, and of several, as values of any type
columns.py    which columns are tokens, labels and masks, and what becomes of a row
index.py      one pass over all rows: offsets, counts, checks; kept in the data cache
dataset.py    `MindDataset`, the rows that a model is trained on
checks.py     what the check of a configuration asks of the files; standard library only
documents.py  the tokens of every row, for other tools
"""
