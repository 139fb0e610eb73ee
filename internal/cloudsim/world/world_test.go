package world

import "testing"

func TestRulesFormAScript(t *testing.T) {
	w := New(0)
	w.Add(Rule{Service: "graph", Route: "send", Times: 1, Status: 503})
	w.Add(Rule{Service: "graph", Route: "send", Times: 2, Skip: 1, Status: 504, After: true})
	var got []int
	for range 6 {
		got = append(got, w.Match("graph", "A@x.example", "send").Status)
	}
	want := []int{503, 0, 504, 504, 0, 0}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("statuses %v, want %v", got, want)
		}
	}
	w.Add(Rule{Mailbox: "a@X.example", Status: 429})
	if w.Match("graph", "b@x.example", "send").Status != 0 || w.Match("gmail-smtp", "A@x.example", "DATA").Status != 429 {
		t.Error("a rule for one mailbox met another")
	}
	w.Reset()
	if w.Match("gmail-smtp", "a@x.example", "DATA").Status != 0 {
		t.Error("a rule survived Reset")
	}
}

func TestEveryRecipientHasACopyInTheRecord(t *testing.T) {
	w := New(4)
	var filed []string
	w.Register("Ann@x.example", func(d Delivery) { filed = append(filed, d.To) })
	w.Deliver("graph", "s@x.example", []string{"ann@X.example", "out@side.example"}, []byte("x"))
	if len(filed) != 1 || len(w.Deliveries()) != 2 {
		t.Errorf("filed %v, recorded %v", filed, w.Deliveries())
	}
	for range 10 {
		w.Deliver("graph", "", []string{"a@b.example"}, nil)
	}
	if n := len(w.Deliveries()); n > 4 {
		t.Errorf("%d deliveries kept of 4", n)
	}
}
