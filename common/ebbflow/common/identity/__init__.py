"""Who is who: keys, names in certificates, and the text of enrolment tokens."""
