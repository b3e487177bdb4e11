"""Streaming: rows of sources that are larger than memory and the disk cache.

shards     files, local or remote, and reading ranges of them    shards.py, remote.py, ranges.py
  │ index  blocks of consecutive records, cached                 index.py, gzip_members.py
  │ order  which block is the n-th of the run                    order.py
  │ read   the records of one block                              reading.py
  │ make   tokens and rows of blocks, ahead of training          producer.py, worker.py
ring       the blocks that are ready, on disk, bounded           ring.py
  │ map    row n of the run                                      rows.py
RowDataset                                                       build.py
"""
