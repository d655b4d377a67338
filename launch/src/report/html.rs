//! Text that others wrote, made safe to stand in a page.

/// The text with everything escaped that means something in HTML, inside elements and inside
/// quoted attributes alike. Control characters, which HTML forbids, become U+FFFD; so do the
/// marks that turn the direction of text, because they can make a line read as another one.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len() + text.len() / 8);
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' | '\t' => safe.push(character),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => safe.push('\u{fffd}'),
            control if control.is_control() => safe.push('\u{fffd}'),
            plain => safe.push(plain),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_can_leave_its_place() {
        assert_eq!(
            escape("</pre><script>alert(\"a\" & 'b')</script>"),
            "&lt;/pre&gt;&lt;script&gt;alert(&quot;a&quot; &amp; &#39;b&#39;)&lt;/script&gt;"
        );
        assert_eq!(
            escape("a\n\tb\u{0}\u{1b}\u{202e}é"),
            "a\n\tb\u{fffd}\u{fffd}\u{fffd}é"
        );
    }
}
