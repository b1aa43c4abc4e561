"""What Streamlit runs, for each visitor and each of their clicks: ``streamlit run script.py -- DEVICE CHOICE…``."""

import sys

from lavis_kvmod.commands.page.show import show

show(sys.argv[2:], device=sys.argv[1])
