from hpt_hf.demo import main

if __name__ == "__main__":
    main()
