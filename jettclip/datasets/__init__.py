"""Where pairs come from: `scenes` (drawn on the spot), `collage` (made of photographs), `published` (data sets)."""
