"""The comparison with other tools, taken apart: what is timed, who competes, errors and demands."""
