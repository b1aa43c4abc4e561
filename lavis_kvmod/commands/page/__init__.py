"""The page of ``lavis-kvmod app``: ``show`` draws it, ``script`` is what Streamlit runs, ``batch`` reads tables.

A folder of its own: Streamlit puts the script's folder in front of ``sys.path``.
"""
