"""Makes the calibration text and the evaluation text of the package out of published archives.

`catalogue` reads texts/sources.toml, `fetch` gets the archives, `forms` turns their files into documents (`chat` and
`problems` write conversations and worked problems), `clean` tidies them, `mix` chooses and orders them, and `records`
writes what the texts hold and under which licences.
"""
