from program import differences, draw_faces, unequal  # noqa: F401
