"""Where nodes run: in this process (``local``), as actors of Ray (``ray``), at SuperNodes (``deploy``)."""
