"""A passage of plain English, for measurements and comparisons that have no text of their own."""

PASSAGE = (
    "The history of the city begins with a ford across the river, where traders met twice a year. In the third century a wall "
    "was built around 12 hectares of land, and by 1450 it had 31 towers; of these, four still stand. "
)
