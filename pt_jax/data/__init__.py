"""From files to arrays: rows, chat templates and masks, batches that resume."""
