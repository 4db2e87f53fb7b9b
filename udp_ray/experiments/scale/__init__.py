"""The scale study: what preparing, opening, drawing and accounting cost against users."""
