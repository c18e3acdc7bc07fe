"""Where pairs come from: `scenes` (drawn), `collage` (of photographs), `published` (data sets)."""
